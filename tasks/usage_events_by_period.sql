-- How many events of each account's period there are, billable or not, and how many prices they are costed by.
SELECT
    account,
    period,
    count(*) AS events,
    list_sort(list_distinct(list(price_version))) AS price_versions
FROM usage_events
WHERE $period IS NULL OR period = $period
GROUP BY account, period
