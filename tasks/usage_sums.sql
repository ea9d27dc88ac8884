-- Billable usage of a period, by what a rate can tell apart.
SELECT
    account,
    plan_version,
    line,
    provider,
    model,
    service_tier,
    sum(requests)::BIGINT AS requests,
    sum(quantity) AS quantity,
    sum(input_tokens)::HUGEINT AS input_tokens,
    sum(cache_read_tokens)::HUGEINT AS cache_read_tokens,
    sum(cache_write_tokens)::HUGEINT AS cache_write_tokens,
    sum(cache_write_1h_tokens)::HUGEINT AS cache_write_1h_tokens,
    sum(input_audio_tokens)::HUGEINT AS input_audio_tokens,
    sum(output_tokens)::HUGEINT AS output_tokens,
    sum(reasoning_tokens)::HUGEINT AS reasoning_tokens,
    sum(output_audio_tokens)::HUGEINT AS output_audio_tokens,
    sum(cost) AS cost,
    sum(unpriced_requests)::BIGINT AS unpriced_requests
FROM usage_15m
WHERE period = $period AND billable
GROUP BY ALL
ORDER BY ALL;
