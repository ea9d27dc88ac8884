"""The Redis store: admissions of many processes on many machines decided in one place, by one script a verb.

`verbs.py` has the logic, `inquirer.py` how often a shard is asked, `asking.py` what is asked and answered, `scripts/`
what runs in Redis, `link.py` and `aio_link.py` the connections, `store.py` and `aio_store.py` the two stores.
"""

__all__: list[str] = []
