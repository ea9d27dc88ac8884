-- Billable usage of a period by model; tokens of calls that named none stand by themselves.
SELECT
    provider,
    model,
    sum(requests)::BIGINT AS requests,
    sum(input_tokens)::HUGEINT AS input_tokens,
    sum(output_tokens)::HUGEINT AS output_tokens,
    sum(cost) AS cost,
    sum(unpriced_requests)::BIGINT AS unpriced_requests
FROM usage_15m
WHERE period = $period AND billable AND (model IS NOT NULL OR input_tokens + output_tokens <> 0)
GROUP BY ALL
ORDER BY ALL;
