-- The same sums from the ledger itself, by its own database: the independent side of `verify`. Also of events that no
-- job has seen yet, so that what is not billed shows.
SELECT
    e.account, e.plan_version, e.line, e.provider, e.model, e.service_tier,
    sum(e.requests) AS requests,
    exact_sum(e.quantity) AS quantity,
    exact_sum(e.input_tokens) AS input_tokens,
    exact_sum(e.cache_read_tokens) AS cache_read_tokens,
    exact_sum(e.cache_write_tokens) AS cache_write_tokens,
    exact_sum(e.cache_write_1h_tokens) AS cache_write_1h_tokens,
    exact_sum(e.input_audio_tokens) AS input_audio_tokens,
    exact_sum(e.output_tokens) AS output_tokens,
    exact_sum(e.reasoning_tokens) AS reasoning_tokens,
    exact_sum(e.output_audio_tokens) AS output_audio_tokens,
    coalesce(exact_sum(c.cost), '0') AS cost,
    coalesce(sum(CASE WHEN c.cost IS NULL THEN e.requests END), 0) AS unpriced_requests
FROM events AS e LEFT JOIN event_costs AS c ON c.seq = e.seq
WHERE e.period = :period AND e.billable
GROUP BY e.account, e.plan_version, e.line, e.provider, e.model, e.service_tier
ORDER BY e.account, e.plan_version, e.line, e.provider, e.model, e.service_tier
