-- The batch's own sums.
INSERT INTO warehouse.usage_15m
SELECT
    time_bucket(INTERVAL '15 minutes', occurred_at),
    account,
    plan_version,
    line,
    provider,
    model,
    service_tier,
    caller_type,
    period,
    billable,
    sum(requests),
    sum(input_tokens),
    sum(cache_read_tokens),
    sum(cache_write_tokens),
    sum(cache_write_1h_tokens),
    sum(input_audio_tokens),
    sum(output_tokens),
    sum(reasoning_tokens),
    sum(output_audio_tokens),
    sum(quantity),
    coalesce(sum(cost), 0),
    coalesce(sum(requests) FILTER (WHERE cost IS NULL), 0)
FROM batch
GROUP BY ALL;
