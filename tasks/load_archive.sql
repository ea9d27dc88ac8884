-- Events of an archive that are not here yet; in the order of the columns of usage_events.
INSERT INTO batch
SELECT
    a.seq,
    a.event_id::UUID,
    a.kind,
    a.corrects::UUID,
    a.account,
    a.key_id,
    a.plan_version,
    a.line,
    a.operation,
    a.caller_type,
    a.occurred_at,
    a.recorded_at,
    a.period,
    a.requests,
    a.input_tokens,
    a.cache_read_tokens,
    a.cache_write_tokens,
    a.cache_write_1h_tokens,
    a.input_audio_tokens,
    a.output_tokens,
    a.reasoning_tokens,
    a.output_audio_tokens,
    a.quantity,
    a.provider,
    a.model,
    a.service_tier,
    a.run_id,
    a.request_id,
    a.platform_paid,
    a.billable,
    a.estimated,
    a.late,
    a.idempotency_key,
    a.source,
    a.cost,
    a.price_version
FROM read_parquet($file) AS a
WHERE NOT EXISTS (
    SELECT 1 FROM usage_events AS u WHERE u.account = a.account AND u.period = a.period AND u.seq = a.seq
)
ORDER BY a.seq
