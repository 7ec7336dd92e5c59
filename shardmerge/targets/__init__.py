"""What a finished directory holds: expected names and shapes, shards, index, config and tokenizer files."""
