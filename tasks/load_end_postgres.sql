-- The last transaction whose events may be loaded. Those below xmin have ended, so whatever they wrote is in every later
-- snapshot; and the first event without a cost waits for it. is_ahead: numbers that this server has not given out.
SELECT
    least(
        pg_snapshot_xmin(snapshot)::text::bigint,
        (
            SELECT min(e.commit_xid) FROM events AS e LEFT JOIN event_costs AS c ON c.seq = e.seq
            WHERE e.commit_xid > {watermark} AND c.seq IS NULL
        )
    ) - 1 AS last,
    coalesce((SELECT max(commit_xid) FROM events) >= pg_snapshot_xmax(snapshot)::text::bigint, false)::int AS is_ahead
FROM pg_current_snapshot() AS snapshot
