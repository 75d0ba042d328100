"""OpenAI's protocol: requests as they come, answers as they go out."""
