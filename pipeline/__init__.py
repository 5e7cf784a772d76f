"""What makes a script a stage: options, errors in one sentence, manifests, shards, processes, where data comes from."""
