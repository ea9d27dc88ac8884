-- Spans. Values that are many come as one JSON text.

-- name: insert_spans
INSERT INTO spans (
    trace_id, span_id, parent_span_id, run_id, account, name, convention, input_tokens, cache_read_tokens,
    cache_write_tokens, cache_write_1h_tokens, input_audio_tokens, output_tokens, reasoning_tokens,
    output_audio_tokens, provider, model, started_at, ended_at, recorded_at, flags
)
SELECT
    json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'),
    json_extract(value, '$[3]'), json_extract(value, '$[4]'), json_extract(value, '$[5]'),
    json_extract(value, '$[6]'), json_extract(value, '$[7]'), json_extract(value, '$[8]'),
    json_extract(value, '$[9]'), json_extract(value, '$[10]'), json_extract(value, '$[11]'),
    json_extract(value, '$[12]'), json_extract(value, '$[13]'), json_extract(value, '$[14]'),
    json_extract(value, '$[15]'), json_extract(value, '$[16]'), json_extract(value, '$[17]'),
    json_extract(value, '$[18]'), json_extract(value, '$[19]'), json_extract(value, '$[20]')
FROM json_each(:rows) WHERE true
ON CONFLICT (trace_id, span_id) DO NOTHING
RETURNING trace_id, span_id

-- name: find_spans
SELECT
    trace_id, span_id, parent_span_id, convention, input_tokens, cache_read_tokens, cache_write_tokens,
    cache_write_1h_tokens, input_audio_tokens, output_tokens, reasoning_tokens, output_audio_tokens, provider,
    model
FROM spans
WHERE (trace_id, span_id) IN (
    SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]') FROM json_each(:ids)
)

-- name: find_parents
SELECT DISTINCT trace_id, parent_span_id FROM spans
WHERE trace_id IN (SELECT value FROM json_each(:trace_ids)) AND parent_span_id IS NOT NULL
