-- Billable usage of a period by UTC day and model; lines without a model stand for themselves.
SELECT
    (quarter AT TIME ZONE 'UTC')::DATE AS date,
    coalesce(model, line) AS series,
    sum(requests)::BIGINT AS requests,
    sum(input_tokens + output_tokens)::HUGEINT AS tokens,
    sum(cost) AS cost
FROM usage_15m
WHERE period = $period AND billable
GROUP BY ALL
ORDER BY ALL;
