"""What the tests share: oracles, engines under watch, hand-made inputs."""
