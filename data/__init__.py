"""What is learned from: documents, tokenizers, token shards, batches. Knows text and tokens, no model."""
