-- New ledger rows: seq above `above`, and not above `up_to`. sqlite_query runs inside SQLite, on the primary keys, so
-- the time it takes follows the batch and not the history; it hands everything over as text.
INSERT INTO warehouse.usage_events
SELECT
    e.seq::BIGINT,
    e.event_id::UUID,
    e.kind,
    e.corrects::UUID,
    e.account,
    e.key_id,
    e.plan_version::INTEGER,
    e.line,
    e.operation,
    e.caller_type,
    e.occurred_at::TIMESTAMPTZ,
    e.recorded_at::TIMESTAMPTZ,
    e.period,
    e.requests::INTEGER,
    e.input_tokens::BIGINT,
    e.cache_read_tokens::BIGINT,
    e.cache_write_tokens::BIGINT,
    e.cache_write_1h_tokens::BIGINT,
    e.input_audio_tokens::BIGINT,
    e.output_tokens::BIGINT,
    e.reasoning_tokens::BIGINT,
    e.output_audio_tokens::BIGINT,
    e.quantity::DECIMAL(38, 12),
    e.provider,
    e.model,
    e.service_tier,
    e.run_id,
    e.request_id,
    e.platform_paid::BOOLEAN,
    e.billable::BOOLEAN,
    e.estimated::BOOLEAN,
    e.late::BOOLEAN,
    e.idempotency_key,
    e.source,
    e.cost::DECIMAL(38, 12)
FROM sqlite_query(
    'ledger',
    'SELECT e.*, c.cost FROM events AS e JOIN event_costs AS c ON c.seq = e.seq
    WHERE e.seq > ? AND e.seq <= ? ORDER BY e.seq',
    params = row(getvariable('above'), getvariable('up_to'))
) AS e;
