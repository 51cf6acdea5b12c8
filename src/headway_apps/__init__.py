"""Complete systems that stand on Headway."""
