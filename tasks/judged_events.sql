-- Every event of the runs to be judged, reversals included, whenever it was.
SELECT * EXCLUDE (name, known_as), name AS known_as FROM model_events SEMI JOIN judged USING (account, run_id) ORDER BY seq
