-- The warehouse: derived from the ledger, so it can be dropped and rebuilt. Kept to what DuckLake has too: no keys, no
-- unique constraints, no sequences. Exactly-once comes from the watermark, moved in the transaction that adds the rows.

-- seq: of the newest event loaded; on Postgres, where these do not come in the order of commits, its commit_xid.
CREATE TABLE IF NOT EXISTS load_watermark (
    ledger_id VARCHAR NOT NULL,
    seq BIGINT NOT NULL
);

-- The newest recost of the ledger when the first event was loaded; a later one changed costs of what is here. One row.
CREATE TABLE IF NOT EXISTS loaded_recost (
    recost INTEGER NOT NULL
);

-- Archives whose events are here: each was looked through once.
CREATE TABLE IF NOT EXISTS loaded_archives (
    account VARCHAR NOT NULL,
    period VARCHAR NOT NULL,
    part INTEGER NOT NULL
);

CREATE TABLE IF NOT EXISTS usage_events (
    seq BIGINT NOT NULL,
    event_id UUID NOT NULL,
    kind VARCHAR NOT NULL,
    corrects UUID,
    account VARCHAR NOT NULL,
    key_id VARCHAR,
    plan_version INTEGER NOT NULL,
    line VARCHAR NOT NULL,
    operation VARCHAR,
    caller_type VARCHAR NOT NULL,
    occurred_at TIMESTAMPTZ NOT NULL,
    recorded_at TIMESTAMPTZ NOT NULL,
    period VARCHAR NOT NULL,
    requests INTEGER NOT NULL,
    input_tokens BIGINT NOT NULL,
    cache_read_tokens BIGINT NOT NULL,
    cache_write_tokens BIGINT NOT NULL,
    cache_write_1h_tokens BIGINT NOT NULL,
    input_audio_tokens BIGINT NOT NULL,
    output_tokens BIGINT NOT NULL,
    reasoning_tokens BIGINT NOT NULL,
    output_audio_tokens BIGINT NOT NULL,
    quantity DECIMAL(38, 12) NOT NULL,
    provider VARCHAR,
    model VARCHAR,
    service_tier VARCHAR,
    run_id VARCHAR,
    request_id VARCHAR,
    platform_paid BOOLEAN NOT NULL,
    billable BOOLEAN NOT NULL,
    estimated BOOLEAN NOT NULL,
    late BOOLEAN NOT NULL,
    idempotency_key VARCHAR,
    source VARCHAR,
    cost DECIMAL(38, 12)
);

-- Of the data that the cost is by. Warehouses of before have it only of what they loaded since.
ALTER TABLE usage_events ADD COLUMN IF NOT EXISTS price_version VARCHAR;

-- Delta rows: each load appends the sums of its own batch, so a quarter hour may have several rows to be added up.
-- A thousand of the largest token counts allowed no longer fit into 64 bits.
CREATE TABLE IF NOT EXISTS usage_15m (
    quarter TIMESTAMPTZ NOT NULL,
    account VARCHAR NOT NULL,
    plan_version INTEGER NOT NULL,
    line VARCHAR NOT NULL,
    provider VARCHAR,
    model VARCHAR,
    service_tier VARCHAR,
    caller_type VARCHAR NOT NULL,
    period VARCHAR NOT NULL,
    billable BOOLEAN NOT NULL,
    requests BIGINT NOT NULL,
    input_tokens DECIMAL(38, 0) NOT NULL,
    cache_read_tokens DECIMAL(38, 0) NOT NULL,
    cache_write_tokens DECIMAL(38, 0) NOT NULL,
    cache_write_1h_tokens DECIMAL(38, 0) NOT NULL,
    input_audio_tokens DECIMAL(38, 0) NOT NULL,
    output_tokens DECIMAL(38, 0) NOT NULL,
    reasoning_tokens DECIMAL(38, 0) NOT NULL,
    output_audio_tokens DECIMAL(38, 0) NOT NULL,
    quantity DECIMAL(38, 12) NOT NULL,
    cost DECIMAL(38, 12) NOT NULL,
    unpriced_requests BIGINT NOT NULL
);

-- seq: of the newest span loaded, as load_watermark has it of events. One row.
CREATE TABLE IF NOT EXISTS span_watermark (
    seq BIGINT NOT NULL
);

-- started_at and ended_at: when it was recorded, where a span does not say.
CREATE TABLE IF NOT EXISTS spans (
    seq BIGINT NOT NULL,
    trace_id VARCHAR NOT NULL,
    span_id VARCHAR NOT NULL,
    parent_span_id VARCHAR,
    run_id VARCHAR NOT NULL,
    account VARCHAR,
    input_tokens BIGINT NOT NULL,
    cache_read_tokens BIGINT NOT NULL,
    cache_write_tokens BIGINT NOT NULL,
    cache_write_1h_tokens BIGINT NOT NULL,
    input_audio_tokens BIGINT NOT NULL,
    output_tokens BIGINT NOT NULL,
    reasoning_tokens BIGINT NOT NULL,
    output_audio_tokens BIGINT NOT NULL,
    provider VARCHAR,
    model VARCHAR,
    started_at TIMESTAMPTZ NOT NULL,
    ended_at TIMESTAMPTZ NOT NULL
);

-- seq: of the newest probe loaded, as load_watermark has it of events. One row.
CREATE TABLE IF NOT EXISTS probe_watermark (
    seq BIGINT NOT NULL
);

-- What providers said of their limits. A probe that found no window is one row without a name, with its error.
CREATE TABLE IF NOT EXISTS provider_windows (
    seq BIGINT NOT NULL,
    credential VARCHAR NOT NULL,
    provider VARCHAR NOT NULL,
    checked_at TIMESTAMPTZ NOT NULL,
    error VARCHAR,
    name VARCHAR,
    limit_value DECIMAL(38, 12),
    remaining DECIMAL(38, 12),
    percent_used DECIMAL(38, 12),
    reset_at TIMESTAMPTZ
);
