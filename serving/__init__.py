"""A server for trained models: a page, and an API that OpenAI's clients can use."""
