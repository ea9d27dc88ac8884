-- How many events of each account's period there are, billable or not, the last of them, and by which prices they are
-- costed.
SELECT
    account,
    period,
    count(*) AS events,
    max(seq) AS last_seq,
    list_sort(list_distinct(list(price_version))) AS price_versions
FROM usage_events
WHERE $period IS NULL OR period = $period
GROUP BY account, period
