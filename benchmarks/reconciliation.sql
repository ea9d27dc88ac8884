-- What a reconciliation of these events and spans cannot do without: both sides by account, run and model, without the
-- agents' spans that repeat what is below them, joined, and every count compared.
WITH billed AS (
    SELECT account, run_id, model, sum(COLUMNS('.*_tokens')) FROM usage_events GROUP BY ALL
),
traced AS (
    SELECT account, run_id, model, sum(COLUMNS('.*_tokens'))
    FROM spans
    ANTI JOIN (SELECT trace_id, parent_span_id AS span_id FROM spans WHERE parent_span_id IS NOT NULL)
    USING (trace_id, span_id)
    GROUP BY ALL
)
SELECT count(*)
FROM billed AS b FULL JOIN traced AS t USING (account, run_id, model)
WHERE b.input_tokens IS DISTINCT FROM t.input_tokens
    OR b.cache_read_tokens IS DISTINCT FROM t.cache_read_tokens
    OR b.cache_write_tokens IS DISTINCT FROM t.cache_write_tokens
    OR b.cache_write_1h_tokens IS DISTINCT FROM t.cache_write_1h_tokens
    OR b.input_audio_tokens IS DISTINCT FROM t.input_audio_tokens
    OR b.output_tokens IS DISTINCT FROM t.output_tokens
    OR b.reasoning_tokens IS DISTINCT FROM t.reasoning_tokens
    OR b.output_audio_tokens IS DISTINCT FROM t.output_audio_tokens;
