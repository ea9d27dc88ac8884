-- The last time that costs of the ledger were changed. The ledger's own database runs it.
SELECT recost, period, reason, CASE WHEN ended THEN 1 ELSE 0 END AS has_ended FROM recosts ORDER BY recost DESC LIMIT 1
