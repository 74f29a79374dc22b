// How much shared memory a block may have, on the device and in the emulation.
#pragma once

// Static and dynamic bytes together, where the launch does not ask for more.
constexpr int SHARED_BYTES_WITHOUT_ASKING = 48 * 1024;
// Static ones, at most, of a kernel that has dynamic ones too: launches count on that instead of asking for each.
constexpr int STATIC_BYTES_BESIDE_DYNAMIC = 1024;

// Whether a launch with so many dynamic bytes has to ask.
constexpr bool asks_for_shared_bytes(int dynamic) { return dynamic > SHARED_BYTES_WITHOUT_ASKING - STATIC_BYTES_BESIDE_DYNAMIC; }
