-- Which accounts the runs to be judged are billed to, whenever.
SELECT run_id, account
FROM suspect_events SEMI JOIN judged USING (run_id)
WHERE billable
GROUP BY ALL
HAVING sum(input_tokens + output_tokens) > 0
ORDER BY ALL
