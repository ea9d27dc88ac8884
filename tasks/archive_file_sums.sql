-- The same of a file, by DuckDB.
SELECT
    count(*) AS events,
    coalesce(sum(requests), 0) AS requests,
    coalesce(sum(input_tokens), 0) AS input_tokens,
    coalesce(sum(cache_read_tokens), 0) AS cache_read_tokens,
    coalesce(sum(cache_write_tokens), 0) AS cache_write_tokens,
    coalesce(sum(cache_write_1h_tokens), 0) AS cache_write_1h_tokens,
    coalesce(sum(input_audio_tokens), 0) AS input_audio_tokens,
    coalesce(sum(output_tokens), 0) AS output_tokens,
    coalesce(sum(reasoning_tokens), 0) AS reasoning_tokens,
    coalesce(sum(output_audio_tokens), 0) AS output_audio_tokens,
    coalesce(sum(quantity), 0) AS quantity,
    coalesce(sum(cost), 0) AS cost,
    coalesce(sum(requests) FILTER (WHERE cost IS NULL), 0) AS unpriced_requests,
    min(seq) AS seq_from,
    max(seq) AS seq_to,
    min(occurred_at) AS first_at,
    max(occurred_at) AS last_at
FROM read_parquet($file)
WHERE account = $account AND period = $period
