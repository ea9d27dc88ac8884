-- Spans above one number and not above another; in the order of the columns of the warehouse's spans. The ledger's own
-- database runs it.
SELECT
    seq,
    trace_id,
    span_id,
    parent_span_id,
    run_id,
    account,
    input_tokens,
    cache_read_tokens,
    cache_write_tokens,
    cache_write_1h_tokens,
    input_audio_tokens,
    output_tokens,
    reasoning_tokens,
    output_audio_tokens,
    provider,
    model,
    coalesce(started_at, ended_at, recorded_at) AS started_at,
    coalesce(ended_at, started_at, recorded_at) AS ended_at
FROM spans
WHERE {marked} > {above} AND {marked} <= {up_to}
ORDER BY seq
