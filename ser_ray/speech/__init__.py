"""From recordings to batches: decode and check (audio), store (shards), batch by length (order), read (stream)."""
