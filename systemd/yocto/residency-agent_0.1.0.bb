SUMMARY = "Keeps vehicle data inside the regions that permit it"
DESCRIPTION = "In-car agent that redacts, region-tags and routes MQTT data"
SECTION = "net"
LICENSE = "Apache-2.0"
LIC_FILES_CHKSUM = "file://LICENSE;md5=3b83ef96387f14655fc854ddc3c6bd57"

# The sdist: `residency-tools package dist` writes it; put it beside this recipe, under files/.
SRC_URI = "file://residency_agent-${PV}.tar.gz;subdir=${BP};striplevel=1"

inherit python_hatchling systemd useradd

# Recipes of poky, meta-openembedded and, for onnxruntime, of the board's layer; the versions that were tested are in
# systemd/requirements.lock.
RDEPENDS:${PN} = "\
    python3-cryptography \
    python3-modules \
    python3-msgpack \
    python3-msgspec \
    python3-numpy \
    python3-onnxruntime \
    python3-paho-mqtt \
    python3-pillow \
    python3-prometheus-client \
    python3-zstandard \
"
RRECOMMENDS:${PN} = "mosquitto ca-certificates libturbojpeg"

SYSTEMD_SERVICE:${PN} = "residency-agent.service"
SYSTEMD_AUTO_ENABLE = "disable"

USERADD_PACKAGES = "${PN}"
GROUPADD_PARAM:${PN} = "--system residency-agent"
USERADD_PARAM:${PN} = "--system --gid residency-agent --home-dir /var/lib/residency-agent --no-create-home --shell /sbin/nologin residency-agent"

do_install:append() {
    install -D -m 0644 ${S}/systemd/residency-agent.service ${D}${systemd_system_unitdir}/residency-agent.service
    sed -i 's,/opt/residency-agent/bin,${bindir},' ${D}${systemd_system_unitdir}/residency-agent.service
    install -D -m 0644 ${S}/systemd/residency-agent.tmpfiles ${D}${nonarch_libdir}/tmpfiles.d/residency-agent.conf
    install -D -m 0644 ${S}/systemd/agent.example.toml ${D}${sysconfdir}/residency-agent/agent.toml
    install -m 0644 ${S}/systemd/policy.example.toml ${D}${sysconfdir}/residency-agent/
    # For testers, and without their dependencies
    rm -r ${D}${PYTHON_SITEPACKAGES_DIR}/tools ${D}${bindir}/residency-tools ${D}${prefix}/share/residency-agent
}

FILES:${PN} += "${nonarch_libdir}/tmpfiles.d"
CONFFILES:${PN} = "${sysconfdir}/residency-agent/agent.toml ${sysconfdir}/residency-agent/policy.example.toml"
