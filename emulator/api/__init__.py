"""The platform's HTTP interfaces: workers, clients, OpenAI gateway, administration and dashboard."""
