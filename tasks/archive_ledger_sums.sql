-- What the events of a period of an account add up to that are in the ledger and have a cost, by its own database.
SELECT
    count(*) AS events,
    coalesce(sum(e.requests), 0) AS requests,
    coalesce(exact_sum(e.input_tokens), '0') AS input_tokens,
    coalesce(exact_sum(e.cache_read_tokens), '0') AS cache_read_tokens,
    coalesce(exact_sum(e.cache_write_tokens), '0') AS cache_write_tokens,
    coalesce(exact_sum(e.cache_write_1h_tokens), '0') AS cache_write_1h_tokens,
    coalesce(exact_sum(e.input_audio_tokens), '0') AS input_audio_tokens,
    coalesce(exact_sum(e.output_tokens), '0') AS output_tokens,
    coalesce(exact_sum(e.reasoning_tokens), '0') AS reasoning_tokens,
    coalesce(exact_sum(e.output_audio_tokens), '0') AS output_audio_tokens,
    coalesce(exact_sum(e.quantity), '0') AS quantity,
    coalesce(exact_sum(c.cost), '0') AS cost,
    coalesce(sum(CASE WHEN c.cost IS NULL THEN e.requests ELSE 0 END), 0) AS unpriced_requests,
    min(e.seq) AS seq_from,
    max(e.seq) AS seq_to,
    min(e.occurred_at) AS first_at,
    max(e.occurred_at) AS last_at
FROM events AS e JOIN event_costs AS c ON c.seq = e.seq
WHERE e.account = :account AND e.period = :period AND e.occurred_at >= :start AND e.occurred_at < :end
