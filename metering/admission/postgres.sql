-- Statements of `sqlite.sql` that Postgres spells in another way. Parameters are texts there, too, and those that stand
-- where no column gives them a type are cast.

-- name: find_changes_by_others
SELECT coalesce(max(seq), 0) FROM outbox

-- name: find_plan_changes
SELECT max(effective_from) FILTER (WHERE effective_from <= :at), min(effective_from) FILTER (WHERE effective_from > :at)
FROM (
    SELECT effective_from FROM account_plans WHERE account = :account
    UNION ALL SELECT effective_from FROM plan_versions WHERE plan = :plan
) AS changes

-- name: find_counters
SELECT metric, line, key_id, window_start, window_end, used
FROM counters
WHERE account = :account AND window_start <= :at AND window_end > :at
    AND (:line::text IS NULL OR line IN ('*', :line)) AND key_id IN ('', :key_id)

-- name: find_rate_counters
SELECT metric, line, key_id, units, period_us, arrival
FROM rate_counters
WHERE account = :account AND (:line::text IS NULL OR line IN ('*', :line)) AND key_id IN ('', :key_id)

-- name: count_window
SELECT
    coalesce(sum(requests), 0) AS requests,
    coalesce(sum(quantity), 0) AS quantity,
    coalesce(sum(input_tokens), 0) AS input_tokens,
    coalesce(sum(cache_read_tokens), 0) AS cache_read_tokens,
    coalesce(sum(cache_write_tokens), 0) AS cache_write_tokens,
    coalesce(sum(cache_write_1h_tokens), 0) AS cache_write_1h_tokens,
    coalesce(sum(input_audio_tokens), 0) AS input_audio_tokens,
    coalesce(sum(output_tokens), 0) AS output_tokens,
    coalesce(sum(reasoning_tokens), 0) AS reasoning_tokens,
    coalesce(sum(output_audio_tokens), 0) AS output_audio_tokens
FROM events
WHERE account = :account AND occurred_at >= :window_start AND occurred_at < :window_end AND counted
    AND (:line = '*' OR line = :line) AND (:key_id = '' OR key_id = :key_id)

-- name: insert_event_ids
INSERT INTO event_ids (event_id, period, fingerprint)
SELECT (value ->> 0)::uuid, value ->> 1, value ->> 2 FROM jsonb_array_elements(:rows::jsonb)
ON CONFLICT (event_id) DO NOTHING
RETURNING event_id

-- name: find_known_ids
SELECT event_id, fingerprint FROM event_ids
WHERE event_id IN (SELECT value::uuid FROM jsonb_array_elements_text(:event_ids::jsonb))

-- name: find_version
SELECT greatest(
    coalesce((SELECT seq FROM outbox WHERE account = :account ORDER BY seq DESC LIMIT 1), 0),
    coalesce((SELECT seq FROM outbox WHERE account IS NULL ORDER BY seq DESC LIMIT 1), 0)
)

-- name: find_handled
SELECT position, 'dead' AS became
FROM dead_letters WHERE position IN (SELECT jsonb_array_elements_text(:positions::jsonb))
UNION ALL
SELECT position, 'reused'
FROM key_reuses WHERE position IN (SELECT jsonb_array_elements_text(:positions::jsonb))

-- name: resolve_dead_event
UPDATE dead_letters SET resolved_at = :now
WHERE shard = :shard AND resolved_at IS NULL AND position(convert_to(:event_id, 'UTF8') IN header) > 0

-- name: insert_log_once
INSERT INTO request_log (
    event_id, hold_id, account, key_id, line, operation, logged_at, expires_at, request, response, error, latency_ms
)
SELECT
    :event_id::uuid, :hold_id::uuid, :account::text, :key_id, :line, :operation, :logged_at::timestamptz,
    :expires_at::timestamptz, :request, :response, :error, :latency_ms::integer
WHERE NOT EXISTS (
    SELECT 1 FROM request_log
    WHERE account = :account::text AND logged_at = :logged_at::timestamptz AND expires_at = :expires_at::timestamptz
        AND event_id IS NOT DISTINCT FROM :event_id::uuid AND hold_id IS NOT DISTINCT FROM :hold_id::uuid
)
