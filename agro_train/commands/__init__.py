"""What `agro` does around training: rollout, score, eval. One file a command."""
