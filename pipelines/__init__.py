"""Jobs for any scheduler: each module is ``run(config) -> Result`` plus a command line of a few words."""
