"""kvswitch for SGLang: ``--radix-cache-backend kvswitch``.

`plugin` registers the memory backend; `radix` is the tree cache that SGLang then uses, on
`switching` (planner and bytes) and `pages` / `allocator` (block groups); `control` is what the
scheduler does besides: priorities, preemption for memory, failed loads. Nothing but `plugin`,
`settings` and `pages` may be imported without SGLang.
"""
