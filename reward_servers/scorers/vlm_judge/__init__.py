"""A vision-language model as a judge: `scorer` asks, `client` talks to vLLM, `server` and `guardian` run it."""
