-- The billable events of an account's period, by when they occurred.
SELECT
    seq,
    event_id,
    kind,
    corrects,
    strftime(occurred_at, '%Y-%m-%dT%H:%M:%S.%fZ') AS occurred_at,
    strftime(recorded_at, '%Y-%m-%dT%H:%M:%S.%fZ') AS recorded_at,
    idempotency_key,
    key_id,
    run_id,
    plan_version,
    line,
    provider,
    model,
    service_tier,
    requests,
    quantity,
    input_tokens,
    cache_read_tokens,
    cache_write_tokens,
    cache_write_1h_tokens,
    input_audio_tokens,
    output_tokens,
    reasoning_tokens,
    output_audio_tokens,
    cost
FROM usage_events
WHERE account = $account AND period = $period AND billable
ORDER BY occurred_at, seq
