"""One MQTT connection: paho's client on asyncio, with every queue bounded."""
