"""Writing a cache: plan, shards under leases, commit records, manifest."""
