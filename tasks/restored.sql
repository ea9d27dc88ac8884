-- What archives have, as they have it.
CREATE TABLE IF NOT EXISTS restored.usage_events AS FROM read_parquet($files) LIMIT 0
