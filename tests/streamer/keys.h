// Two key pairs that guard nothing but these tests.
#pragma once

#include "streamer/signature.h"

namespace kvcast::test {

inline constexpr const char* kPrivatePem[] = {
    "-----BEGIN PRIVATE KEY-----\n"
    "MC4CAQAwBQYDK2VwBCIEIIIJpJn+gIVxtc5OYL2N2gwf0a+gVqeIAVlAxz1I5SkE\n"
    "-----END PRIVATE KEY-----\n",
    "-----BEGIN PRIVATE KEY-----\n"
    "MC4CAQAwBQYDK2VwBCIEIMOu/HpO5rStIYB5tnBVmkYa4Q1qMI3dtqiKk8kmtLh5\n"
    "-----END PRIVATE KEY-----\n"};

inline constexpr const char* kPublicPem[] = {
    "-----BEGIN PUBLIC KEY-----\n"
    "MCowBQYDK2VwAyEA9/mM2WT6ZRsgkS5JhEmtCk8N+Mkkc802/NurFDzFoC0=\n"
    "-----END PUBLIC KEY-----\n",
    "-----BEGIN PUBLIC KEY-----\n"
    "MCowBQYDK2VwAyEA8SnWmI05QzBHh9Adh+BzUuDpz3XBQUl8BCvPrF2s36M=\n"
    "-----END PUBLIC KEY-----\n"};

inline streamer::PrivateKey private_key(int n) {
    return streamer::PrivateKey::from_pem(kPrivatePem[n - 1]).value();
}
inline streamer::PublicKey public_key(int n) {
    return streamer::PublicKey::from_pem(kPublicPem[n - 1]).value();
}

}  // namespace kvcast::test
