"""The benchmark suite behind `ovfast bench`: what a machine does, beside what it could do."""
