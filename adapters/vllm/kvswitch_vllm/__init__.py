"""kvswitch for vLLM: ``vllm serve MODEL --kv-offload=kvswitch``.

`plugin` puts the flag on vLLM's command line; `connector` is the KV connector, whose two halves are
`planning` (scheduler process) and `moving` (each worker); `scheduler` adds preemption by priority,
and `block_pool` block groups. No module but `plugin` and `settings` may be imported without vLLM.
"""
