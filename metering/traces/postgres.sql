-- Statements of `sqlite.sql` that Postgres spells in another way.

-- name: insert_spans
INSERT INTO spans (
    trace_id, span_id, parent_span_id, run_id, account, name, convention, input_tokens, cache_read_tokens,
    cache_write_tokens, cache_write_1h_tokens, input_audio_tokens, output_tokens, reasoning_tokens,
    output_audio_tokens, provider, model, started_at, ended_at, recorded_at, flags
)
SELECT
    value ->> 0, value ->> 1, value ->> 2, value ->> 3, value ->> 4, value ->> 5, value ->> 6,
    (value ->> 7)::bigint, (value ->> 8)::bigint, (value ->> 9)::bigint, (value ->> 10)::bigint,
    (value ->> 11)::bigint, (value ->> 12)::bigint, (value ->> 13)::bigint, (value ->> 14)::bigint,
    value ->> 15, value ->> 16, (value ->> 17)::timestamptz, (value ->> 18)::timestamptz,
    (value ->> 19)::timestamptz, value ->> 20
FROM jsonb_array_elements(:rows::jsonb)
ON CONFLICT (trace_id, span_id) DO NOTHING
RETURNING trace_id, span_id

-- name: find_spans
SELECT
    trace_id, span_id, parent_span_id, convention, input_tokens, cache_read_tokens, cache_write_tokens,
    cache_write_1h_tokens, input_audio_tokens, output_tokens, reasoning_tokens, output_audio_tokens, provider,
    model
FROM spans
WHERE (trace_id, span_id) IN (SELECT value ->> 0, value ->> 1 FROM jsonb_array_elements(:ids::jsonb))

-- name: find_parents
SELECT DISTINCT trace_id, parent_span_id FROM spans
WHERE trace_id IN (SELECT jsonb_array_elements_text(:trace_ids::jsonb)) AND parent_span_id IS NOT NULL
