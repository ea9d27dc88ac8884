-- Whole numbers of any size, as decimal text. Lua's own lose digits above 2^53, and a quantity, in units of 10^-12, or an
-- arrival time of a rate soon is.

local function plain(number)
    return string.format('%.0f', number + 0)
end

-- Below 10^15, where doubles add exactly.
local function is_small(text)
    return #text < 16
end

-- The arithmetic of larger ones is made when a call first needs it: most never do.
local large
local function of_large()
    if large then
        return large
    end
    local BASE, WIDTH = 10000000, 7

    local function limbs(digits)
        local parts = {}
        for last = #digits, 1, -WIDTH do
            parts[#parts + 1] = tonumber(string.sub(digits, math.max(1, last - WIDTH + 1), last))
        end
        return parts
    end

    local function text_of(parts)
        local top = #parts
        while top > 1 and parts[top] == 0 do
            top = top - 1
        end
        local text = {plain(parts[top])}
        for at = top - 1, 1, -1 do
            text[#text + 1] = string.format('%07d', parts[at])
        end
        return table.concat(text)
    end

    local function split(text)
        if string.sub(text, 1, 1) == '-' then
            return true, string.sub(text, 2)
        end
        return false, text
    end

    local function compare_digits(a, b)
        if #a ~= #b then
            return #a < #b and -1 or 1
        end
        return a == b and 0 or (a < b and -1 or 1)
    end

    local function add_digits(a, b)
        local left, right, sum, carry = limbs(a), limbs(b), {}, 0
        for at = 1, math.max(#left, #right) do
            local part = (left[at] or 0) + (right[at] or 0) + carry
            carry = part >= BASE and 1 or 0
            sum[at] = part - carry * BASE
        end
        if carry > 0 then
            sum[#sum + 1] = carry
        end
        return text_of(sum)
    end

    -- `a` is not the smaller one.
    local function subtract_digits(a, b)
        local left, right, rest, borrow = limbs(a), limbs(b), {}, 0
        for at = 1, #left do
            local part = left[at] - (right[at] or 0) - borrow
            borrow = part < 0 and 1 or 0
            rest[at] = part + borrow * BASE
        end
        return text_of(rest)
    end

    local function signed(negative, digits)
        return (negative and digits ~= '0') and '-' .. digits or digits
    end

    local function compare(a, b)
        local a_negative, a_digits = split(a)
        local b_negative, b_digits = split(b)
        if a_negative ~= b_negative then
            return a_negative and -1 or 1
        end
        local order = compare_digits(a_digits, b_digits)
        return a_negative and -order or order
    end

    local function add(a, b)
        local a_negative, a_digits = split(a)
        local b_negative, b_digits = split(b)
        if a_negative == b_negative then
            return signed(a_negative, add_digits(a_digits, b_digits))
        end
        if compare_digits(a_digits, b_digits) >= 0 then
            return signed(a_negative, subtract_digits(a_digits, b_digits))
        end
        return signed(b_negative, subtract_digits(b_digits, a_digits))
    end

    local function multiply(a, b)
        local left, right, product = limbs(a), limbs(b), {}
        for at = 1, #left + #right do
            product[at] = 0
        end
        for i = 1, #left do
            local carry = 0
            for j = 1, #right do
                local part = product[i + j - 1] + left[i] * right[j] + carry
                carry = math.floor(part / BASE)
                product[i + j - 1] = part - carry * BASE
            end
            product[i + #right] = product[i + #right] + carry
        end
        return text_of(product)
    end

    large = {compare = compare, add = add, multiply = multiply}
    return large
end

local function compare(a, b)
    if is_small(a) and is_small(b) then
        local left, right = tonumber(a), tonumber(b)
        return left == right and 0 or (left < right and -1 or 1)
    end
    return of_large().compare(a, b)
end

local function add(a, b)
    if is_small(a) and is_small(b) then
        return plain(tonumber(a) + tonumber(b))
    end
    return of_large().add(a, b)
end

local function subtract(a, b)
    if b == '0' then
        return a
    end
    return add(a, string.sub(b, 1, 1) == '-' and string.sub(b, 2) or '-' .. b)
end

local function greater(a, b)
    return compare(a, b) > 0 and a or b
end

-- Whether so much more is above the most there may be.
local function exceeds(used, more, most)
    if is_small(used) and is_small(more) and is_small(most) then
        return used + more > tonumber(most)
    end
    return compare(add(used, more), most) > 0
end

-- Of two numbers that are not negative.
local function multiply(a, b)
    return of_large().multiply(a, b)
end
