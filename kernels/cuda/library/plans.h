// The plans of all ops by name: the one list that a new plan.h is added to.
#pragma once

#include <cstring>
#include <map>
#include <stdexcept>
#include <string>

#include "../attention/plan.h"
#include "../bias_activation/plan.h"
#include "../codebook/plan.h"
#include "../group_norm/plan.h"
#include "../head/plan.h"
#include "../linear/plan.h"
#include "ops.h"

namespace edge {

/// A plan function behind a common type; its shape struct holds 32-bit numbers alone, so words are copied into it.
template <auto Plan>
struct Planned;

template <class Shape, unsigned (*Plan)(const Shape&, EdgeLaunch*)>
struct Planned<Plan> {
    static constexpr size_t FIELDS = sizeof(Shape) / 4;
    static unsigned plan(const void* words, EdgeLaunch* out) {
        Shape shape;
        std::memcpy(&shape, words, sizeof shape);
        return Plan(shape, out);
    }
};

inline Planner planner(const std::string& name, size_t fields) {
    struct Row {
        Planner plan;
        size_t fields;
    };
#define EDGE_PLAN_ROW(name) {#name, {Planned<edge_plan_##name>::plan, Planned<edge_plan_##name>::FIELDS}}
    static const std::map<std::string, Row> rows = {
        EDGE_PLAN_ROW(attention), EDGE_PLAN_ROW(attention_merge), EDGE_PLAN_ROW(bias_activation),
        EDGE_PLAN_ROW(codebook),  EDGE_PLAN_ROW(group_norm),      EDGE_PLAN_ROW(head),
        EDGE_PLAN_ROW(linear),    EDGE_PLAN_ROW(merge_top),
    };
#undef EDGE_PLAN_ROW
    const auto found = rows.find(name);
    if (found == rows.end()) throw std::logic_error("ops.txt: there is no plan " + name);
    if (found->second.fields != fields) throw std::logic_error("ops.txt: plan " + name + " has other fields");
    return found->second.plan;
}

}  // namespace edge
