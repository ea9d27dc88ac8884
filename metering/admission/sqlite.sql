-- The statements of an admission, run on the cursor of a driver inside one transaction. Times are UTC text of fixed
-- width, quantities are decimal text, ids are 32 hex digits.

-- name: authenticate
SELECT k.key_id, k.account, k.expires_at, k.revoked_at, k.last_used_at
FROM api_keys AS k
WHERE k.digest = :digest

-- name: place
SELECT a.time_zone, a.anchor_day, v.plan_version
FROM accounts AS a JOIN plan_versions AS v ON v.plan = (
    SELECT p.plan FROM account_plans AS p
    WHERE p.account = a.account AND p.effective_from <= :at
    ORDER BY p.effective_from DESC LIMIT 1
)
WHERE a.account = :account AND v.effective_from <= :at
ORDER BY v.effective_from DESC, v.version DESC
LIMIT 1

-- name: find_plan_changes
SELECT max(effective_from) FILTER (WHERE effective_from <= :at), min(effective_from) FILTER (WHERE effective_from > :at)
FROM (
    SELECT effective_from FROM account_plans WHERE account = :account
    UNION ALL SELECT effective_from FROM plan_versions WHERE plan = :plan
)

-- name: find_changes_by_others
PRAGMA data_version

-- name: touch_key
UPDATE api_keys SET last_used_at = :now WHERE key_id = :key_id

-- name: find_event_id
SELECT i.fingerprint, r.response, r.stored_at
FROM event_ids AS i LEFT JOIN replays AS r ON r.event_id = i.event_id
WHERE i.event_id = :event_id

-- name: find_hold_in_flight
SELECT hold_id, account, key_id, line, admitted_at, expires_at, fingerprint, reserved, rate_claims
FROM holds
WHERE event_id = :event_id AND state = 'open'

-- name: find_hold
SELECT state, settlement, settled_event_id, rate_claims FROM holds WHERE hold_id = :hold_id

-- name: find_first_expiry
SELECT min(expires_at) FROM holds WHERE account = :account AND state = 'open'

-- name: find_expired_holds_of_account
SELECT hold_id, account, key_id, line, admitted_at, expires_at, fingerprint, reserved, rate_claims
FROM holds
WHERE account = :account AND state = 'open' AND expires_at <= :now
ORDER BY expires_at
LIMIT :most

-- name: find_accounts_to_sweep
SELECT DISTINCT account FROM holds WHERE state = 'open' AND expires_at <= :now ORDER BY account

-- name: find_open_holds_of_window
SELECT reserved
FROM holds
WHERE account = :account AND state = 'open' AND admitted_at >= :window_start AND admitted_at < :window_end
    AND (:line = '*' OR line = :line) AND (:key_id = '' OR key_id = :key_id)

-- name: insert_hold
INSERT INTO holds (
    hold_id, event_id, account, key_id, line, run_id, fingerprint, state, admitted_at, expires_at, reserved, rate_claims
) VALUES (
    :hold_id, :event_id, :account, :key_id, :line, :run_id, :fingerprint, 'open', :admitted_at, :expires_at, :reserved,
    :rate_claims
)

-- name: insert_settled_hold
INSERT INTO holds (
    hold_id, event_id, account, key_id, line, run_id, fingerprint, state, admitted_at, expires_at, reserved, rate_claims,
    settlement, settled_event_id
) VALUES (
    :hold_id, :event_id, :account, :key_id, :line, :run_id, :fingerprint, 'settled', :admitted_at, :expires_at, '{}',
    '[]', :settlement, :settled_event_id
)

-- name: close_hold
UPDATE holds SET state = :state WHERE hold_id = :hold_id AND state = 'open'

-- name: settle_hold
UPDATE holds
SET state = 'settled', settlement = :settlement, settled_event_id = :settled_event_id
WHERE hold_id = :hold_id

-- name: renew_hold
UPDATE holds SET expires_at = :expires_at WHERE hold_id = :hold_id AND state = 'open'

-- name: find_settled_event
SELECT billable, late FROM events WHERE event_id = :event_id

-- name: find_counters
SELECT metric, line, key_id, window_start, window_end, used
FROM counters
WHERE account = :account AND window_start <= :at AND window_end > :at
    AND (:line IS NULL OR line IN ('*', :line)) AND key_id IN ('', :key_id)

-- name: put_counter
INSERT INTO counters (account, window_start, window_end, metric, line, key_id, used)
VALUES (:account, :window_start, :window_end, :metric, :line, :key_id, :used)
ON CONFLICT (account, window_start, window_end, metric, line, key_id) DO UPDATE SET used = excluded.used

-- name: drop_counters
DELETE FROM counters WHERE account = :account AND window_end <= :before

-- name: count_window
SELECT
    coalesce(sum(requests), 0) AS requests,
    coalesce(exact_sum(quantity), '0') AS quantity,
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

-- name: find_rate_counters
SELECT metric, line, key_id, units, period_us, arrival
FROM rate_counters
WHERE account = :account AND (:line IS NULL OR line IN ('*', :line)) AND key_id IN ('', :key_id)

-- name: put_rate_counter
INSERT INTO rate_counters (account, metric, line, key_id, units, period_us, arrival)
VALUES (:account, :metric, :line, :key_id, :units, :period_us, :arrival)
ON CONFLICT (account, metric, line, key_id, units, period_us) DO UPDATE SET arrival = excluded.arrival

-- name: insert_event_id
INSERT INTO event_ids (event_id, period, fingerprint) VALUES (:event_id, :period, :fingerprint)
ON CONFLICT (event_id) DO NOTHING

-- name: insert_event_ids
INSERT INTO event_ids (event_id, period, fingerprint)
SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]')
FROM json_each(:rows) WHERE true
ON CONFLICT (event_id) DO NOTHING
RETURNING event_id

-- name: find_known_ids
SELECT event_id, fingerprint FROM event_ids WHERE event_id IN (SELECT value FROM json_each(:event_ids))

-- name: insert_event
INSERT INTO events (
    event_id, kind, corrects, account, key_id, plan_version, line, operation, caller_type, occurred_at, recorded_at,
    period, requests, input_tokens, cache_read_tokens, cache_write_tokens, cache_write_1h_tokens, input_audio_tokens,
    output_tokens, reasoning_tokens, output_audio_tokens, quantity, provider, model, service_tier, run_id, request_id,
    session_id, attributes, platform_paid, billable, estimated, counted, late, error, latency_ms, idempotency_key,
    fingerprint, source, reason
) VALUES (
    :event_id, :kind, :corrects, :account, :key_id, :plan_version, :line, :operation, :caller_type, :occurred_at,
    :recorded_at, :period, :requests, :input_tokens, :cache_read_tokens, :cache_write_tokens, :cache_write_1h_tokens,
    :input_audio_tokens, :output_tokens, :reasoning_tokens, :output_audio_tokens, :quantity, :provider, :model,
    :service_tier, :run_id, :request_id, :session_id, :attributes, :platform_paid, :billable, :estimated, :counted,
    :late, :error, :latency_ms, :idempotency_key, :fingerprint, :source, :reason
)

-- name: insert_replay
INSERT INTO replays (event_id, response, stored_at) VALUES (:event_id, :response, :stored_at)

-- name: insert_log
INSERT INTO request_log (
    event_id, hold_id, account, key_id, line, operation, logged_at, expires_at, request, response, error, latency_ms
) VALUES (
    :event_id, :hold_id, :account, :key_id, :line, :operation, :logged_at, :expires_at, :request, :response, :error,
    :latency_ms
)

-- name: find_event
SELECT * FROM events WHERE event_id = :event_id

-- name: find_archived
SELECT coalesce(
    (SELECT a.period FROM events AS e JOIN archives AS a ON a.account = e.account AND a.period = e.period
    WHERE e.event_id = :event_id AND e.seq <= a.seq_to LIMIT 1),
    (SELECT i.period FROM event_ids AS i
    WHERE i.event_id = :event_id AND NOT EXISTS (SELECT 1 FROM events AS e WHERE e.event_id = i.event_id))
)

-- name: find_run_events
SELECT event_id, kind, corrects, seq, model FROM events WHERE run_id = :run_id

-- name: count_run_spans
SELECT count(*), coalesce(max(seq), 0) FROM spans
WHERE trace_id IN (SELECT trace_id FROM spans WHERE run_id = :run_id)

-- name: mark_applied
UPDATE verdicts SET applied_at = :applied_at, applied_by = :applied_by
WHERE reconciliation = :reconciliation AND number = :number AND applied_at IS NULL

-- name: find_plan_version
SELECT plan, document FROM plan_versions WHERE plan_version = :plan_version

-- name: insert_outbox
INSERT INTO outbox (account, recount, created_at) VALUES (:account, :recount, :created_at)

-- name: find_version
SELECT max(
    coalesce((SELECT seq FROM outbox WHERE account = :account ORDER BY seq DESC LIMIT 1), 0),
    coalesce((SELECT seq FROM outbox WHERE account IS NULL ORDER BY seq DESC LIMIT 1), 0)
)

-- name: insert_streamed_id
INSERT INTO event_ids (event_id, period, fingerprint, position) VALUES (:event_id, :period, :fingerprint, :position)
ON CONFLICT (event_id) DO NOTHING

-- name: find_shard
SELECT epoch, seq, lost FROM shards WHERE shard = :shard

-- name: put_shard
INSERT INTO shards (shard, epoch, seq, lost, drained_at) VALUES (:shard, :epoch, :seq, :lost, :drained_at)
ON CONFLICT (shard) DO UPDATE
SET epoch = excluded.epoch, seq = excluded.seq, lost = excluded.lost, drained_at = excluded.drained_at

-- name: find_handled
SELECT position, 'dead' AS became FROM dead_letters WHERE position IN (SELECT value FROM json_each(:positions))
UNION ALL
SELECT position, 'reused'
FROM key_reuses WHERE position IN (SELECT value FROM json_each(:positions))

-- name: insert_dead_letter
INSERT INTO dead_letters (position, shard, noticed_at, error, header, body, account, period)
VALUES (:position, :shard, :noticed_at, :error, :header, :body, :account, :period)

-- name: resolve_dead_event
UPDATE dead_letters SET resolved_at = :now
WHERE shard = :shard AND resolved_at IS NULL AND instr(header, CAST(:event_id AS BLOB)) > 0

-- name: insert_key_reuse
INSERT INTO key_reuses (position, account, event_id, billed_as, noticed_at)
VALUES (:position, :account, :event_id, :billed_as, :noticed_at)

-- name: find_key_reuses
SELECT billed_as FROM key_reuses WHERE event_id = :event_id AND billed_as IS NOT NULL

-- name: find_billable_to
SELECT
    EXISTS (SELECT 1 FROM accounts WHERE account = :account),
    EXISTS (SELECT 1 FROM plan_versions WHERE plan_version = :plan_version)

-- name: note_key_used
UPDATE api_keys SET last_used_at = :at WHERE key_id = :key_id AND (last_used_at IS NULL OR last_used_at < :at)

-- name: forget_counters
DELETE FROM counters WHERE account = :account

-- name: find_position
SELECT position, fingerprint FROM event_ids WHERE event_id = :event_id

-- name: insert_log_once
INSERT INTO request_log (
    event_id, hold_id, account, key_id, line, operation, logged_at, expires_at, request, response, error, latency_ms
)
SELECT
    :event_id, :hold_id, :account, :key_id, :line, :operation, :logged_at, :expires_at, :request, :response, :error,
    :latency_ms
WHERE NOT EXISTS (
    SELECT 1 FROM request_log
    WHERE account = :account AND logged_at = :logged_at AND expires_at = :expires_at AND event_id IS :event_id
        AND hold_id IS :hold_id
)
