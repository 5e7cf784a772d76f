"""What every stage needs: options, errors in one sentence, manifests, shards, processes, where data comes from."""
