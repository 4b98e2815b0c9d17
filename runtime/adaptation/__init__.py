"""When and how θ changes: gate, buffer, schedule, step, guard, and the adapter that joins them."""
