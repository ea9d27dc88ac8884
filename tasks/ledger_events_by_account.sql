-- How many events of a period the ledger has, by account, costed or not. The ledger's own database runs it.
SELECT account, count(*) AS events FROM events WHERE period = :period GROUP BY account
