"""Text and tokens: documents, tokenizers, token shards and batches. Knows no model."""
