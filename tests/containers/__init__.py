"""The image and docker-compose.yml on a real Docker Engine. `make test-containers`."""
