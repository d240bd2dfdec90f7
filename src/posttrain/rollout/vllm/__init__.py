"""The engine on vLLM: in this process, as a server that it starts, or attached to a running one (docs/engines.md).

`engine` speaks to a `Backend`; `in_process`, `served` and `started` are the three. What runs inside vLLM's processes
(`transfer`, `guard`, `arguments`, `serve`) needs nothing else of posttrain, so that vLLM may live in an environment of
its own, with another version of transformers.
"""
