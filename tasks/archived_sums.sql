-- What ledger_sums.sql says of the ledger, of the archives of a period.
SELECT
    account, plan_version, line, provider, model, service_tier,
    sum(requests) AS requests,
    sum(quantity) AS quantity,
    sum(input_tokens) AS input_tokens,
    sum(cache_read_tokens) AS cache_read_tokens,
    sum(cache_write_tokens) AS cache_write_tokens,
    sum(cache_write_1h_tokens) AS cache_write_1h_tokens,
    sum(input_audio_tokens) AS input_audio_tokens,
    sum(output_tokens) AS output_tokens,
    sum(reasoning_tokens) AS reasoning_tokens,
    sum(output_audio_tokens) AS output_audio_tokens,
    coalesce(sum(cost), 0) AS cost,
    coalesce(sum(requests) FILTER (WHERE cost IS NULL), 0) AS unpriced_requests
FROM read_parquet($files)
WHERE billable
GROUP BY account, plan_version, line, provider, model, service_tier
ORDER BY account, plan_version, line, provider, model, service_tier
