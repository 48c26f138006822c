"""From recordings to batches: decode and check (audio), keep (shards), bucket by length (stream)."""
