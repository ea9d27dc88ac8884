-- What ran on the platform's own keys, by UTC day and what providers tell apart. Also what is not billable, and what was
-- taken back: the provider charges for every call. Not signals without a model, which count texts and are no calls, nor
-- what takes those back.
SELECT
    (occurred_at AT TIME ZONE 'UTC')::DATE AS day,
    provider,
    model,
    sum(requests)::BIGINT AS requests,
    sum(input_tokens)::HUGEINT AS input_tokens,
    sum(cache_read_tokens)::HUGEINT AS cache_read_tokens,
    sum(cache_write_tokens)::HUGEINT AS cache_write_tokens,
    sum(cache_write_1h_tokens)::HUGEINT AS cache_write_1h_tokens,
    sum(input_audio_tokens)::HUGEINT AS input_audio_tokens,
    sum(output_tokens)::HUGEINT AS output_tokens,
    sum(reasoning_tokens)::HUGEINT AS reasoning_tokens,
    sum(output_audio_tokens)::HUGEINT AS output_audio_tokens,
    coalesce(sum(cost), 0) AS cost,
    coalesce(sum(requests) FILTER (WHERE cost IS NULL), 0)::BIGINT AS unpriced_requests
FROM usage_events
WHERE occurred_at >= $start AND occurred_at < $end
    AND platform_paid
    AND (
        model IS NOT NULL
        OR kind <> 'signal' AND coalesce(
            corrects NOT IN (SELECT event_id FROM usage_events WHERE kind = 'signal' AND model IS NULL), true
        )
    )
GROUP BY ALL
ORDER BY ALL;
